"""From a user's files to samples: source formats, conversations, images, the split into parts."""
