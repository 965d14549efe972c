"""One file a framework. Importing one imports its framework."""
