"""Names that deployments and runs share."""

FLOW = "pipeline"
TIME = "%Y-%m-%d %H:%M:%S"
