"""Other problems, and their verifiers."""
