"""What one types: the command line and what its commands do."""
