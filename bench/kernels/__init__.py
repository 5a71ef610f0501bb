"""What bench/moe_kernels.py is made of: arithmetic, results and the plot need no GPU; the rest does."""
