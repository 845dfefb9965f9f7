"""Claims of speed and size, each a script that measures us and the peer in one run and prints ratios."""
