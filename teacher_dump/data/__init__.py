"""Reads a user's files as samples: formats, conversations, images, the split into parts. Uses only the config."""
