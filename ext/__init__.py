"""Sources of the native kernels and the driver that builds them on first use. Knows nothing of the Python above it."""
