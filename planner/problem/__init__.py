"""What is to be planned: documents, a cluster, what groups cost; by name, from files, or fitted."""
