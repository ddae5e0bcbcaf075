"""Making of experts out of dense feed-forwards: units, clusters, routers, controls."""
