"""What would it cost? Groups timed here, memory in a dry run, layers priced from their shapes."""
