"""The CPU kernels: C++ sources, and the library that they are built into."""
