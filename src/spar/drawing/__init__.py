"""What both the report and the web page draw: HTML by construction, and the routing of one picture."""
