"""Analysis of routing: who uses how many experts, which ones, and what that depends on."""
