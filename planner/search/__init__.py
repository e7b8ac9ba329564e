"""Good plans in a moment: batching, packing under deadlines, squeezing."""
