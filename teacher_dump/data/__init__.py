"""From a user's files to samples: formats, conversations, images, the split into parts. Uses the config alone."""
