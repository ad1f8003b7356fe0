"""Conversations: as files have them, and as models read them."""
