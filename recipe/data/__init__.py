"""Rows → spans → token ids with an exact mask → one flattened batch."""
