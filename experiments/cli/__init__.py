"""The console command: one module a group of subcommands, and what they share."""
