"""The lineage of artifacts, both ways, and a document's way through the pipeline."""
