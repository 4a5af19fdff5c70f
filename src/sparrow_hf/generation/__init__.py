"""Drafting, verification and the loop that joins them."""
