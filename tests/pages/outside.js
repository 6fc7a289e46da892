// What reaches over the right edge of the window without a frame that scrolls.
() => [...document.querySelectorAll('main *')].filter(e => {
  let frame = e;
  while (frame && !['auto', 'scroll', 'hidden'].includes(getComputedStyle(frame).overflowX)) frame = frame.parentElement;
  return (!frame || frame === document.body || frame.tagName === 'HTML') && e.getBoundingClientRect().right > innerWidth + 1;
}).map(e => `${e.tagName}.${e.className}: ${Math.round(e.getBoundingClientRect().right)}`).slice(0, 5)
