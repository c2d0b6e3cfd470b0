"""How records become bytes and Arrow columns, and back. Pure; uses records."""
