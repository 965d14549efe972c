"""What is counted, pooled over the ranks and given back to the routers."""
