"""What a user can choose, without torch: names, options, the configuration of each command, layers of files."""
