"""What a run needs of memory."""
