"""Jobs done by worker processes side by side, with progress over all of them."""
