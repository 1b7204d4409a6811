"""What the two sides say to each other, and how it travels. Imports nothing of ours."""
