"""What any Shoal process needs: settings, logs, metrics, exit codes and the clock as an argument. A leaf."""
