"""What a parametrized test is called: the same in every process, which those of a parallel run compare."""

import re


def in_words(value):
    """A value in words, without its address in memory.

    >>> in_words([print, object()])
    '[<built-in function print>, <object object>]'
    """
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))
