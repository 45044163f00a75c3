"""What answers are like, and whether they got better."""
