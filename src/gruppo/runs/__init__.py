"""Runs: what is asked, what is made of it, the loop around `train.fit`, and what stays on disk.

asked      config (the run file)   given (Python objects)   resolve (what was left open)
made       build (the policy)   data, tasks   grading   stages (recipe, stream, learning rate)   preflight (before step 0)
running    session (the loop, its state, resume)   interrupt   broken   track   threads
measured   measure (one step)   evaluate (held-out tasks)
on disk    folder   disk (whole files)   rows, completions, pictures (tables of paths)
looked at  report   show   compare   doctor, doctor_flow
"""
