"""What stage `clean` is made of: the published rules, and the kernels that measure texts for them."""
