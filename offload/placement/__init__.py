"""Where in memory each buffer lies: bounds, searches, an independent checker, pictures."""
