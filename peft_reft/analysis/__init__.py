"""What an adapter does to a text: which tokens it edits, how much, and along which directions."""
