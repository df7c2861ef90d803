"""The dialects, one file each; they call the same service and never each other."""
