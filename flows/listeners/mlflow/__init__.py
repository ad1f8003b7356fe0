"""MLflow, and nothing but it: no other module imports ``mlflow``.

What its client reads from the environment is set here, before any module imports it.
"""

import os

SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # who sends tries again himself, and who asks gets an error at once
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}
for name, value in SETTINGS.items():
    os.environ.setdefault(name, value)
