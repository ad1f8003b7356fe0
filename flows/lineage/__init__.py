"""What came from what: artifacts both ways, and a document's way through the line."""
