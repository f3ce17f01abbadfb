/**
 * Minifies static/widget/loader.js into the version that it names: `npm ci && npm run widget`.
 *
 * Pages pin a version by its hash, so a version that was released is never written again: raise `version` in the loader
 * first. `--again` writes the newest one again while nobody has it yet. tests/app/test_widget.py holds the files to
 * MANIFEST.json.
 */

import { createHash } from 'node:crypto';
import { readFile, writeFile } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { gzipSync } from 'node:zlib';
import { transform } from 'esbuild';

const FOLDER = join(dirname(fileURLToPath(import.meta.url)), '../../static/widget');
const MAX_BYTES = 5000; // with gzip

const hash = (name, content) => createHash(name).update(content).digest('base64');

const source = await readFile(join(FOLDER, 'loader.js'), 'utf8');
const [, version] = /version: '(1\.\d+\.\d+)'/.exec(source);
const manifest = JSON.parse(await readFile(join(FOLDER, 'MANIFEST.json'), 'utf8').catch(() => '{}'));
if (manifest[version] && manifest[version].source !== hash('sha384', source) && !process.argv.includes('--again')) {
  throw new Error(`${version} is there already and was made of another loader.js: raise its version`);
}
const compact = source.replace(/replaceSync\(`[^`]*`/, (style) => style.replaceAll(/\n\s*/g, ''));
const { code } = await transform(compact, { minify: true, target: 'es2022', charset: 'utf8', legalComments: 'none' });
const content = `/* Umbel ${version}, Apache-2.0 */${code}`;
const bytes = gzipSync(content, { level: 9 }).length;
if (bytes > MAX_BYTES) throw new Error(`${bytes} bytes with gzip, ${MAX_BYTES} allowed`);
await writeFile(join(FOLDER, `v${version}.js`), content);
manifest[version] = { sha384: hash('sha384', content), source: hash('sha384', source) };
await writeFile(join(FOLDER, 'MANIFEST.json'), `${JSON.stringify(manifest, null, 2)}\n`);
console.log(`v${version}.js: ${bytes} bytes with gzip`);
