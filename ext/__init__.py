"""The native kernels: C++ sources and the driver that builds them on first use. Knows no Python above it."""
