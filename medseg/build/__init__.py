"""The only place where a workflow becomes objects; what cannot be built is reported with its line."""
