"""Sources of text: the kinds that there are, and the documents that they yield."""
