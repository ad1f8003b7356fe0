"""Stage ``dedup``: documents without duplicates, exact, near and repeated spans."""
