"""Pictures of what was measured. Nothing else imports matplotlib."""
