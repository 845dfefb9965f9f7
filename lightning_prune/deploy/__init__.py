"""What zeros are worth: sparse files, faster inference, and what was measured of them."""
