"""What stage `download` is made of: kinds of source, how each is listed and fetched, and readers of formats."""
