"""Golden vectors, the checker of ports, and ports of SCoRe to other libraries."""
