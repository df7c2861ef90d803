"""The service: HTTP in front of an encoder that lives in a process of its own. Nothing here imports torch on import."""
