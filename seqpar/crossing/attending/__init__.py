"""What attention over a cut sequence can do besides: other sequences, rows that no window hides, earlier calls."""
