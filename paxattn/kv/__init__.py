"""What is stored, and who owns which page."""
