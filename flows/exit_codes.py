"""The exit codes of `danling`."""

DONE, FAILED, BAD_INPUT, RESUMABLE, INTERRUPTED = 0, 1, 2, 75, 130

MEANINGS = """\
exit codes:
  0    done (a run that is complete already counts as done)
  1    a run failed; its rank's traceback is the last thing on stderr
  2    bad input: one message, nothing trained
  75   stopped by SIGTERM, SIGHUP, SIGUSR1, SIGUSR2 or by its time limit; the
       same command, without --fresh, resumes it
  130  stopped by Ctrl-C, likewise; a second Ctrl-C kills at once
"""
