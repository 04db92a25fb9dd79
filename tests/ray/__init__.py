"""What needs a real Ray: the commands as a user runs them, streams, nodes that join and leave."""
