"""The recipes that the library ships, one YAML file each."""
