"""The ground floor: errors, files, processes, text and kernels, each defined once. It imports nothing above it."""
